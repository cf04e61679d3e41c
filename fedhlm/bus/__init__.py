"""How messages travel: the bus, MQTT, and what every party adds to both."""
