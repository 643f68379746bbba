"""Many hosts: an agent on each starts stages there, a head plans over all of them and starts anew what is lost."""
