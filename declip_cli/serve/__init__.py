"""Search as a local page: what it answers, and the server it is reached by."""
