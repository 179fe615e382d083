//! Certificates, join tokens and mutual TLS for a Pilotlight cell.
