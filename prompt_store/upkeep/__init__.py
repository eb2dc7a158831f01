"""What keeps a store in order over the years: collecting what nothing names, verifying, backing up, restoring."""
