"""What plugins claim, how they are found, and which rule describes a module."""
