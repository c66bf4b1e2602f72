"""Many conversions in one run: the manifest, which of them are done already, the run itself."""
