//! The eBPF programs of tcp-udp-trace.
#![no_std]
#![no_main]
