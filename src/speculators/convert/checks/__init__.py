"""What a conversion is checked for, one module per kind of check."""
