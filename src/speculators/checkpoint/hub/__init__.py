"""The Hugging Face Hub: fetching files, reading headers from afar, uploading, its errors."""
