"""How well a draft drafts: acceptance, speed, and whether the output is the verifier's own."""
