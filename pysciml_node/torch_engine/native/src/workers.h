/* Workers, each in a thread. */
typedef struct {
  void *job;
  int64_t (*run)(void *job, int64_t worker);
  int running; /* whether one of them goes on in another call */
} Workers;

static void psn_work(void *x, int worker) {
  Workers *w = x;
  if (w->run(w->job, worker) == RUNNING) SHOW(w->running, 1);
}

static int64_t psn_in_threads(void *job, int64_t (*run)(void *, int64_t), int64_t workers) {
  Workers w = {job, run, 0};
  Team team;
  psn_open(&team, (int)workers, workers);
  psn_do(&team, psn_work, &w);
  psn_close(&team);
  return w.running ? RUNNING : SUCCESS;
}
