"""The batch store on PostgreSQL, for one gateway or several."""
