"""The ops that routers bring along."""
