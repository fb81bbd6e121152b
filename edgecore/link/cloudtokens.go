package link

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxAnswer bounds an answer of the API server to a TokenRequest.
const maxAnswer = 256 << 10

// idleAPIConn is how long a connection waits for the next request: pods that
// start together share it.
const idleAPIConn = 10 * time.Second

var errNoToken = errors.New("the answer holds no token")

// CloudTokens asks the API server for service account tokens over the tunnel,
// as this node. It implements tokens.Cloud.
type CloudTokens struct {
	client *http.Client
}

// NewCloudTokens makes a CloudTokens that dials through l.
func NewCloudTokens(l *Link) *CloudTokens {
	return &CloudTokens{client: &http.Client{Transport: &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return l.DialAPI(ctx) },
		MaxIdleConnsPerHost: 1,
		MaxConnsPerHost:     4,
		IdleConnTimeout:     idleAPIConn,
		DisableCompression:  true,

		MaxResponseHeaderBytes: 64 << 10,
	}}}
}

// CreateToken implements tokens.Cloud. An answer of the API server other than
// success is an apierrors.APIStatus; any other error means it was not asked.
func (c *CloudTokens) CreateToken(ctx context.Context, namespace, serviceAccount string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	in := tr.DeepCopy()
	in.TypeMeta = metav1.TypeMeta{Kind: "TokenRequest", APIVersion: "authentication.k8s.io/v1"}
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	u := "http://hub/api/v1/namespaces/" + url.PathEscape(namespace) + "/serviceaccounts/" + url.PathEscape(serviceAccount) + "/token"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	res, err := c.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("request a token for %s/%s: %w", namespace, serviceAccount, err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if len(answer) > maxAnswer {
		err = fmt.Errorf("the answer exceeds the limit of %d bytes", maxAnswer)
	}
	if err != nil {
		return nil, fmt.Errorf("request a token for %s/%s: %w", namespace, serviceAccount, err)
	}
	if res.StatusCode == http.StatusServiceUnavailable || res.StatusCode == http.StatusBadGateway || res.StatusCode == http.StatusGatewayTimeout {
		return nil, fmt.Errorf("request a token for %s/%s: the API server does not answer (%s)", namespace, serviceAccount, res.Status)
	}
	if res.StatusCode/100 != 2 {
		var st metav1.Status
		if json.Unmarshal(answer, &st) != nil || st.Code == 0 {
			return nil, fmt.Errorf("request a token for %s/%s: %s", namespace, serviceAccount, res.Status)
		}
		return nil, &apierrors.StatusError{ErrStatus: st}
	}
	var out authenticationv1.TokenRequest
	if err := json.Unmarshal(answer, &out); err != nil {
		return nil, fmt.Errorf("request a token for %s/%s: %w", namespace, serviceAccount, err)
	}
	if out.Status.Token == "" {
		return nil, fmt.Errorf("request a token for %s/%s: %w", namespace, serviceAccount, errNoToken)
	}
	return &out, nil
}
