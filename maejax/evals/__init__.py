"""What a representation is worth, measured on frozen features."""
