"""The batch store on SQLite, in one directory, for one process."""
