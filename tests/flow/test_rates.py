from flow_kit import about, new_rates


def test_a_scheduler_gets_what_was_fitted_last_and_a_restore_renews_it():
    rates = new_rates()
    rates.prefill.forward_pass([100], [0], 1.0)
    assert rates.prefill.model(refit=False) is None
    rates.restore.queued(2000)
    rates.restore.part_ended(2000, 0.5)
    assert rates.restore.model(refit=False) is None
    rates.restore.part_ended(2000, 0.5)
    assert rates.prefill.model(refit=False).seconds(100, 0) == about(1.0)
    assert rates.restore.model(refit=False).seconds(1, 2000) == about(0.5)


def test_a_scheduler_gets_what_was_fitted_last_of_a_tier():
    rates = new_rates()
    rates.restore.queued(2000)
    rates.restore.part_ended(2000, 0.5, None, "raw")
    assert rates.restore.model(refit=False, profile_name="raw") is None
    rates.restore.part_ended(2000, 0.5, None, "raw")
    assert rates.restore.model(refit=False, profile_name="raw").seconds(1, 2000) == about(0.5)
