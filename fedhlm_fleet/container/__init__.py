"""What runs in containers beside the parts themselves: their health, their certificates, and a client."""
