"""The speculators format, whatever the family: config.json, conversion.json, tensor tables."""
