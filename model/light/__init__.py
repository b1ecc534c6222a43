"""The `light` family: encode an image once, answer each click with a light decoder."""
