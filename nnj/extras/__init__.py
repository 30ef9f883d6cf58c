"""What needs a package beside torch, each in a file that is read only where it is used."""
