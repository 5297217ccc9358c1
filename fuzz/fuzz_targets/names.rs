#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcp_udp_trace::fuzzing::names(bytes));
