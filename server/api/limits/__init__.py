"""What one client may cost the others. ``bodies`` has the threads for requests and their prompts."""
