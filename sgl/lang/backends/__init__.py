"""What answers programs: our own runtime, in this process or over HTTP, and APIs of others."""
