"""What makes the pages: figures of the concepts, and the site's hooks."""
