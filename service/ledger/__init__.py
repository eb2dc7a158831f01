"""What requests leave behind: entries in a journal on this machine's disk, and how they come to the store."""
