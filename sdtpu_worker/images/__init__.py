"""Pictures on their way out: encoded, stored by task id, and read back by the web app."""
