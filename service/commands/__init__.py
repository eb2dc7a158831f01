"""`softcue serve`, `softcue register-base`, `softcue experiments ...`: the service on the command line."""
