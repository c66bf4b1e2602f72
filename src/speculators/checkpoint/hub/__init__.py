"""The Hugging Face Hub: fetching files, uploading, its errors."""
