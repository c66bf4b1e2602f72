"""Publishing a converted draft on the Hugging Face Hub, with its model card."""
