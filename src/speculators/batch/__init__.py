"""Many conversions in one run: their manifest, which of them are done, and the run itself."""
