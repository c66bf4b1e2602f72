"""The families of drafts: what each is made of, and how it is recognised; without torch."""
