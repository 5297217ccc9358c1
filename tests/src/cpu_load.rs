//! CPU load.

use std::{
    hint::spin_loop,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Keeps every CPU busy until it is dropped.
#[derive(Debug)]
pub struct CpuLoad {
    stop: Arc<AtomicBool>,
}

impl CpuLoad {
    /// Starts one spinning thread per CPU.
    #[must_use]
    pub fn on_every_cpu() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    spin_loop();
                }
            });
        }
        Self { stop }
    }
}

impl Drop for CpuLoad {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
