"""How a message stays safe between Redis and a job: claimed, checked, leased, acknowledged or requeued."""
