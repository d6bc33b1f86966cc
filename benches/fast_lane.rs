//! Times the parts of a request's way: `cargo bench`, `cargo bench -- null`. What they are is in `src/`; `contrib/gate` counts
//! the instructions of the same.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "Criterion's macros")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vub_cases::CASES;

fn all(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, make) in CASES {
        // One after the other: some drive the thread.
        let mut group = c.benchmark_group(*name);
        let mut case = make(dir.path());
        group.throughput(Throughput::Elements(case.ops().into()));
        group.bench_function("run", |b| {
            b.iter_custom(|runs| {
                let mut time = Duration::ZERO;
                for _ in 0..runs {
                    case.prepare();
                    let start = Instant::now();
                    case.run();
                    time += start.elapsed();
                }
                time
            });
        });
        case.prepare();
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = all
}
criterion_main!(benches);
