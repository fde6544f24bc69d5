/* What Python calls of the loop over members. */
static int64_t psn_march_worker(void *job, int64_t i) {
  Many *m = job;
  Worker *w = m->workers + i;
  w->memory = m->memory + i * m->memory_stride;
  return w->status == SUCCESS ? SUCCESS : (w->status = psn_members_march(m, w));
}

int64_t members_march(Many *m) {
  if (!m->workers) m->workers = calloc(m->threads, sizeof(Worker));
  return m->workers ? psn_in_threads(m, psn_march_worker, m->threads) : OUT_OF_MEMORY;
}

/* The steps of all members that have been solved, one after the other. */
void members_gather(const Many *m, const int64_t *offsets, REAL *ends, double *steps) {
  for (int64_t i = 0; i < m->members; i++) {
    const int64_t *counts = m->counts + (m->rows ? m->rows[i] : i) * COUNTS;
    const Worker *w = m->workers + counts[LANE] / ABREAST;
    int64_t l = counts[LANE] % ABREAST, from = counts[FIRST], n = offsets[i + 1] - offsets[i];
    if (!n) continue;
    memcpy(ends + offsets[i] * N, w->ends[l] + from * N, n * N * sizeof(REAL));
    memcpy(steps + offsets[i] * 4, w->steps[l] + from * 4, n * 4 * sizeof(double));
  }
}

void members_release(Many *m) {
  if (!m->workers) return;
  for (int64_t i = 0; i < m->threads; i++)
    LANES_ALL free(m->workers[i].ends[l]), free(m->workers[i].steps[l]);
  free(m->workers);
  m->workers = 0;
}

/* Make the workers ready for another solve; where their steps take more than `most` bytes a lane,
   let go of these. */
void members_rest(Many *m, int64_t most) {
  for (int64_t i = 0; i < m->threads; i++) {
    Worker *w = m->workers + i;
    w->started = w->status = 0;
    LANES_ALL {
      w->used[l] = 0;
      if (w->room[l] * (int64_t)(N * sizeof(REAL) + 4 * sizeof(double)) <= most) continue;
      free(w->ends[l]), free(w->steps[l]);
      w->ends[l] = 0, w->steps[l] = 0, w->room[l] = 0;
    }
  }
}

void prepare(const REAL *const *tensors, REAL *packed) { pack_all(tensors, packed); }
