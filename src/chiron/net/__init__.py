"""HTTP/1.1 and real time: the server, the client and the clock that everything live stands on."""
