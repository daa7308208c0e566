"""Code that several evaluation protocols share."""
