"""The message bus: its interface, the MQTT client behind it, and the endpoint that every party uses."""
