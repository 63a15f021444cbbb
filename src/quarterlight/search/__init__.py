"""From files to rows, and from a query to what it finds."""
