"""Training stages. Each reads files, writes a folder, and can be stopped and resumed at any moment."""
