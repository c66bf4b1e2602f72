"""From checkpoint families to the speculators format."""
