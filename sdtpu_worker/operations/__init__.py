"""What operators ask and are told: health, start-up checks of Redis, and logs without prompts."""
