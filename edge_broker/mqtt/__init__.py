"""An MQTT broker for one machine: versions 3.1.1 and 5, without sessions that outlive their connection."""
