"""What single update rules do on problems small enough to see through."""
