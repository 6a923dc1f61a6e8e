//! The fuzz targets over a short corpus (`fuzz/seeds`, found by libFuzzer and kept small) and over made-up inputs: what was once found stays found.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use proptest::prelude::*;

#[test]
fn the_corpus_still_passes() {
    // From the package's folder, where cargo runs tests: a path from compile time would be another clone's where two share a target folder.
    let seeds = "fuzz/seeds";
    for (name, target) in [("decoder", targets::decoder as fn(&[u8])), ("line", targets::line)] {
        let mut count = 0;
        for entry in std::fs::read_dir(format!("{seeds}/{name}")).expect("the corpus is in the repository") {
            let path = entry.expect("an entry").path();
            target(&std::fs::read(&path).expect("a seed"));
            count += 1;
        }
        assert!(count >= 10, "{name}: only {count} seeds");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_decode_or_do_not(data in prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..300)) {
        targets::decoder(&data);
    }

    #[test]
    fn any_order_of_things_is_survived(data in prop::collection::vec(any::<u8>(), 0..600)) {
        targets::line(&data);
    }
}
