"""What camfn is held to, and what it is tried on: loops written from papers, small networks, models of libraries, and peers."""
