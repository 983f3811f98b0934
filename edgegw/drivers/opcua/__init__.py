"""OPC UA: reading by poll or subscription, and browsing."""
