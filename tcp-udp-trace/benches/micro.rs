//! Measures the cost of one event between the ring and the consumer. `cargo xtask bench --micro`
//! runs it, and makes the library expose the functions that it needs.

#[cfg(not(micro_bench))]
fn main() {}

#[cfg(micro_bench)]
fn main() {
    divan::main();
}

#[cfg(micro_bench)]
mod micro {
    use divan::{Bencher, black_box, counter::ItemsCount};
    use tcp_udp_trace::{Event, bench_support};

    #[divan::bench]
    fn decode_state_change(bencher: Bencher<'_, '_>) {
        decode(bencher, &bench_support::state_change());
    }

    #[divan::bench]
    fn decode_accept(bencher: Bencher<'_, '_>) {
        decode(bencher, &bench_support::accept());
    }

    #[divan::bench]
    fn decode_send(bencher: Bencher<'_, '_>) {
        decode(bencher, &bench_support::send());
    }

    fn decode(bencher: Bencher<'_, '_>, record: &[u8]) {
        bencher
            .counter(ItemsCount::new(1_usize))
            .bench_local(|| bench_support::event(black_box(record)));
    }

    /// Passes a batch through a queue that has room for all of it.
    #[divan::bench(args = [1, 64, 1024])]
    fn queue(bencher: Bencher<'_, '_>, batch: usize) {
        pass(bencher, batch, batch);
    }

    /// Passes a batch through a queue that sheds half of it.
    #[divan::bench(args = [64, 1024])]
    fn queue_that_sheds(bencher: Bencher<'_, '_>, batch: usize) {
        pass(bencher, batch, batch / 2);
    }

    fn pass(bencher: Bencher<'_, '_>, batch: usize, capacity: usize) {
        let event = bench_support::event(&bench_support::state_change());
        let queue = bench_support::BenchQueue::new(capacity);
        bencher
            .counter(ItemsCount::new(batch))
            .with_inputs(|| vec![event.clone(); batch])
            .bench_local_refs(|events: &mut Vec<Event>| {
                queue.push(events);
                queue.take_all(|event| drop(black_box(event)));
            });
    }
}
