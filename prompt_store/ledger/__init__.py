"""What happened on live traffic: who saw which arm, what was answered, what came of it."""
