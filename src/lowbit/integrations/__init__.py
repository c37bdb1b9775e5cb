"""Where lowbit meets other libraries."""
