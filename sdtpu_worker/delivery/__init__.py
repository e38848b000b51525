"""How a message stays safe between Redis and a job: checked, claimed, leased, acknowledged or given back."""
