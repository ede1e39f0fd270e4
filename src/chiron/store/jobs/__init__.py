"""Files, batches and items as rows of a database, in SQL that SQLite and PostgreSQL both speak.

What differs between the two, such as leases, content of files and how a transaction is made, is in their own folders.
"""
