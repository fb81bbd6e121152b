package enroll

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// Config says where the state lives and how generous the hub is.
type Config struct {
	Client kubernetes.Interface // required
	// Namespace holds all Secrets of this package; it is created if missing.
	// Empty means "skerry-system".
	Namespace string

	// ServerNames are the DNS names and IP addresses edges reach the hub by;
	// they go into its serving certificate. Empty means the host's name,
	// "localhost" and every address of the host's interfaces at start.
	ServerNames []string

	// VirtualCIDR is what nodes' virtual IPs are taken from. Zero means
	// 100.64.0.0/16 (of the shared address space, RFC 6598).
	VirtualCIDR netip.Prefix

	// CertLifetime of node certificates; zero means 90 days.
	CertLifetime time.Duration
	// GraceAfterExpiry is how long after its end a known, unrevoked node's
	// certificate still buys a new one (and nothing else). Zero means 365
	// days: edges lie in warehouses. Negative means none.
	GraceAfterExpiry time.Duration

	// JoinRate is how many join requests per second one address may make in
	// the long run, JoinBurst how many at once. Zero means 10 and 50.
	JoinRate  float64
	JoinBurst int
	// MaxJoins bounds the joins and renewals under way at once; zero means 32.
	MaxJoins int

	// OnRevoked is called after an identity lost its standing: forgotten,
	// revoked or replaced, here or at another replica. The hub cuts the
	// tunnels of exactly that identity (NodeRecord.Enrollment). It may be
	// called twice for one, from several goroutines, and must not block. Nil
	// means nobody cares.
	OnRevoked func(gone NodeRecord, why RevokeReason)

	Clock func() time.Time // nil means time.Now
	Log   *slog.Logger     // nil discards
}

const (
	defaultNamespace    = "skerry-system"
	defaultVirtualCIDR  = "100.64.0.0/16"
	defaultCertLifetime = 90 * 24 * time.Hour
	defaultGrace        = 365 * 24 * time.Hour

	// A join must be over well before another may take its token's use over
	// (staleReservation).
	joinTimeout      = 30 * time.Second
	staleReservation = 2 * time.Minute

	housekeepingEvery = 10 * time.Minute
)

// Enroll is the hub's registry of nodes. Its methods may be called at once
// from many goroutines, before and during Run.
type Enroll struct {
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	secrets typedcorev1.SecretInterface

	ca     *authority
	server *servingCert
	tokens *Tokens
	index  *index
	pool   *ipPool

	limits   *addressLimiter
	inFlight chan struct{}
	renewals *limiters

	lookups  *rate.Limiter // live reads on behalf of callers the index does not know
	unknown  *refusals
	promote  chan promotion // next keys seen in use
	synced   chan struct{}  // closed once the index holds what the cluster holds
	syncOnce sync.Once
}

// New checks cfg and makes sure the namespace and the CA exist. It starts
// nothing.
func New(ctx context.Context, cfg Config) (*Enroll, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if err := ensureNamespace(ctx, cfg.Client, cfg.Namespace); err != nil {
		return nil, err
	}
	secrets := cfg.Client.CoreV1().Secrets(cfg.Namespace)
	ca, err := ensureAuthority(ctx, secrets, cfg.Namespace, cfg.Clock)
	if err != nil {
		return nil, err
	}
	server, err := newServingCert(ca, cfg.ServerNames, cfg.Clock, cfg.Log)
	if err != nil {
		return nil, err
	}
	e := &Enroll{
		cfg:      cfg,
		log:      cfg.Log,
		now:      cfg.Clock,
		secrets:  secrets,
		ca:       ca,
		server:   server,
		tokens:   newTokens(secrets, cfg.Clock, ca.pin()),
		index:    newIndex(),
		pool:     newIPPool(cfg.VirtualCIDR),
		limits:   newAddressLimiter(cfg.JoinRate, cfg.JoinBurst),
		inFlight: make(chan struct{}, cfg.MaxJoins),
		renewals: newNodeLimiter(),
		lookups:  rate.NewLimiter(50, 100),
		unknown:  newRefusals(),
		promote:  make(chan promotion, 1024),
		synced:   make(chan struct{}),
	}
	return e, nil
}

func (cfg *Config) complete() error {
	if cfg.Client == nil {
		return errors.New("enroll: Config.Client is required")
	}
	if cfg.Namespace == "" {
		cfg.Namespace = defaultNamespace
	}
	if msgs := validation.IsDNS1123Label(cfg.Namespace); len(msgs) > 0 {
		return fmt.Errorf("enroll: namespace %q: %s", cfg.Namespace, msgs[0])
	}
	if !cfg.VirtualCIDR.IsValid() {
		cfg.VirtualCIDR = netip.MustParsePrefix(defaultVirtualCIDR)
	}
	cfg.VirtualCIDR = cfg.VirtualCIDR.Masked()
	if hostBits := cfg.VirtualCIDR.Addr().BitLen() - cfg.VirtualCIDR.Bits(); hostBits < 2 {
		return fmt.Errorf("enroll: virtual CIDR %s has no room for nodes; give at least two host bits", cfg.VirtualCIDR)
	}
	if cfg.CertLifetime == 0 {
		cfg.CertLifetime = defaultCertLifetime
	}
	if cfg.CertLifetime < time.Minute {
		return fmt.Errorf("enroll: certificate lifetime %s is below a minute", cfg.CertLifetime)
	}
	switch {
	case cfg.GraceAfterExpiry == 0:
		cfg.GraceAfterExpiry = defaultGrace
	case cfg.GraceAfterExpiry < 0:
		cfg.GraceAfterExpiry = 0
	}
	if cfg.JoinRate == 0 {
		cfg.JoinRate = 10
	}
	if cfg.JoinBurst == 0 {
		cfg.JoinBurst = 50
	}
	if cfg.MaxJoins == 0 {
		cfg.MaxJoins = 32
	}
	if cfg.JoinRate < 0 || cfg.JoinBurst < 0 || cfg.MaxJoins < 0 {
		return errors.New("enroll: join rate, burst and number of joins must not be negative")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func ensureNamespace(ctx context.Context, client kubernetes.Interface, name string) error {
	_, err := client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		return nil
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("enroll: read namespace %s: %w", name, err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	_, err = client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("enroll: create namespace %s: %w; create it with: kubectl create namespace %s", name, err, name)
	}
	return nil
}

// Run keeps the index of nodes current, finishes key changes and clears what
// has run out, until ctx ends.
func (e *Enroll) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return e.watch(ctx) })
	g.Go(func() error { return e.promoteKeys(ctx) })
	g.Go(func() error { return e.keepHouse(ctx) })
	return g.Wait()
}

// Synced is closed once Run has read every node.
func (e *Enroll) Synced() <-chan struct{} { return e.synced }

// Tokens returns the join tokens.
func (e *Enroll) Tokens() *Tokens { return e.tokens }

// CACertificate returns the CA all of the hub's certificates end in.
func (e *Enroll) CACertificate() *x509.Certificate { return e.ca.cert }
