"""The operations of the forward, one file each: the file's reference is its specification."""
